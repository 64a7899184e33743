"""What dividing the training among sites costs, one cause at a time: many small trainings in one batched network."""
