"""What tests lean on: real servers made small, and doubles of the ones that cannot be had."""
