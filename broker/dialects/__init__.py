"""The clients' wire protocols as pure grammar: bytes in, facts and bytes out, no I/O.

Each dialect is one module with symmetrical names (`read_…`, `rewrite_…`, `…Reader`, `fold_…`, `heartbeat`,
`error_object`, `error_event`, `DONE`) and knows nothing of the others. Shared below them: `json_splice` and `sse`.
"""
