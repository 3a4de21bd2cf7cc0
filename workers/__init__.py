"""The hands of the house: one process per GPU host that wakes models, claims jobs and streams their answers."""
