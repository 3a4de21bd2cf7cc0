--- @include files
-- No part is longer: whoever reads a file holds some of them at once.
local PART_BYTES = 262144
-- Adds a line to one of the two files that a batch writes, and makes the file with the first one. What was computed is
-- written whatever the caller's files hold by then: it counts, and only what is sent next is refused.
--   k: {batch, file, parts, files}   b: `read_batch`   which: "output" or "error"
local function append_line(k, b, which, file_id, now, line)
  local f = redis.call("HMGET", k.file, "bytes", "parts", "lines")
  if not f[1] then
    redis.call("HSET", k.file, "id", file_id, "caller", b.caller, "purpose", "batch_output", "state", "sent",
      "filename", b.id .. "_" .. which .. ".jsonl", "created_at", ms(now), "uses", "1")
    redis.call("HSET", k.batch, which .. "_file_id", file_id)
  end
  local text, parts = line .. "\n", f[2] or 0
  for i = 1, #text, PART_BYTES do
    redis.call("RPUSH", k.parts, string.sub(text, i, i + PART_BYTES - 1))
    parts = parts + 1
  end
  redis.call("HSET", k.file, "parts", ms(parts), "lines", ms((f[3] or 0) + 1))
  keep_file(k.file, k.parts, k.files, file_id, tonumber(f[1] or 0) + #line + 1, now,
    tonumber(b.expires_at) + tonumber(b.keep_ms))
end
local BATCH_ENDED = { completed = true, failed = true, expired = true, cancelled = true }
-- What every verb of batches must know of one, nil where there is none.
local function read_batch(batch)
  local names = { "id", "caller", "state", "ending", "taken", "read_all", "expires_at", "keep_ms" }
  local b = {}
  for i, value in ipairs(redis.call("HMGET", batch, unpack(names))) do b[names[i]] = value end
  return b.id and b or nil
end
