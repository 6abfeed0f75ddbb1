"""The inference daemon: a loop thread with the sockets, a decode thread with the models, a recorder."""
