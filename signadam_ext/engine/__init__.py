"""One step: the plan that parameters are cut into, the reading of gradients, and what a step tells of itself."""
