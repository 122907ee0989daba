"""Training: the module over the functions, optimizers, schedules of what trains, Lightning and Trainer."""
