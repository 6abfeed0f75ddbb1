"""What tests start: daemons around fake models on a run directory of their own, and what they measure of them."""
