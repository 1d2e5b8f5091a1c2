"""Memory of a training: predicted in closed form, simulated, measured, and held together."""
