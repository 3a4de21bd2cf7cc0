"""What stands in Redis, read and nothing else: for the moments in which the api, a worker or the scheduler is dead."""
