"""Several processes and devices: starting, agreeing, sharding."""
