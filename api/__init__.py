"""The front door: HTTP in, jobs to the broker, frames back out; and the command line."""
