"""What stands outside the container, on login and compute nodes: light, and never torch."""
