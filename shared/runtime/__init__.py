"""What every process needs of its machine: locks, supervision, signals, logs, atomic files,
progress, power, failpoints.
"""
