"""One step: the plan that a list of parameters is cut into, the reading of gradients, and what a step tells of itself."""
