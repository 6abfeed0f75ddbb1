"""What travels between processes and how: records and messages, the codec, ZeroMQ, endpoints and keys, outboxes, the client."""
