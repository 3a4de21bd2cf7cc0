"""The memory and the mind of the house: everything that Redis holds, and every rule about it.

Read in this order: `lifecycle` (a job's life), `keyspace` (every key), `lua/submit.lua` (one verb, whole),
`lanes` and `jobs` (the verbs), `dispatch` (who is next), `due` (what a passed instant means).
"""
