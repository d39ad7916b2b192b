"""What several tasks are made of: attention, recurrence, search, sampling. Ordinary PyTorch, no task's own."""
