-- Accepts a batch. Its file is kept, and is not to be deleted, until it has ended. Sent again, it is one batch; an SDK that
-- tries again knows no id, and is led to the batch that its first try made of the file a moment ago, if it asks the same.
-- An Idempotency-Key leads to the batch that it made as long as that is kept, and neither failed nor is to
-- end before its lines do; whatever else an SDK says then.
--   KEYS[1] batch          KEYS[2] batches   KEYS[3] batches_of   its caller
--   KEYS[4] file           KEYS[5] parts     KEYS[6] files        of its caller
--   KEYS[7] batch_idem     of its key
--   ARGV[1] now            ARGV[2] batch_id  ARGV[3] file_id
--   ARGV[4] within_ms      its completion window                  ARGV[5] keep_ms      after its end
--   ARGV[6] most           batches that are kept of a caller
--   ARGV[7] asked          what the client said, in a digest     ARGV[8] retried_ms   0 = this is no second try
--   ARGV[9] keyed          1 = it has an Idempotency-Key
--   ARGV[10 ..] fields of the batch's hash, name and value in turn
-- Returns the id of the batch.
-- Errors: NOFILE, BATCHLIMIT, IDEMMISMATCH.
--- @include now_ms
--- @include files
local now = now_ms(ARGV[1])
if redis.call("EXISTS", KEYS[1]) == 1 then return ARGV[2] end
if ARGV[9] == "1" then
  local made, same = string.match(redis.call("GET", KEYS[7]) or "", "^(%S+) (%S+)$")
  local there = made and redis.call("HMGET", string.sub(KEYS[1], 1, -#ARGV[2] - 1) .. made, "state", "ending")
  if there and there[1] and there[1] ~= "failed" and (there[2] or "") == "" then
    if same ~= ARGV[7] then return redis.error_reply("IDEMMISMATCH " .. made) end
    return made
  end
end
local f = redis.call("HMGET", KEYS[4], "state", "purpose", "bytes", "expires_at", "lines", "opened")
if f[1] ~= "sent" or f[2] ~= "batch" then return redis.error_reply("NOFILE " .. ARGV[3]) end
local first, asked, at = string.match(f[6] or "", "^(%S+) (%S+) (%d+)$")
if ARGV[9] == "0" and first and asked == ARGV[7] and now - tonumber(at) < tonumber(ARGV[8]) then return first end
local kept = redis.call("ZCOUNT", KEYS[3], "(" .. ms(now), "+inf")
if kept >= tonumber(ARGV[6]) then
  return redis.error_reply("BATCHLIMIT the caller has " .. kept .. " batches, and no more are kept")
end

local ends = now + tonumber(ARGV[4])
local til = ends + tonumber(ARGV[5])
local fields = { "state", "validating", "created_at", ms(now), "expires_at", ms(ends), "total", f[5] or "0" }
for i = 10, #ARGV do fields[#fields + 1] = ARGV[i] end
redis.call("HSET", KEYS[1], unpack(fields))
redis.call("PEXPIRE", KEYS[1], ms(til - now))
redis.call("ZADD", KEYS[2], ms(now), ARGV[2])
redis.call("ZREMRANGEBYSCORE", KEYS[3], "-inf", ms(now))
redis.call("ZADD", KEYS[3], ms(til), ARGV[2])
if redis.call("PTTL", KEYS[3]) < til - now then redis.call("PEXPIRE", KEYS[3], ms(til - now)) end
if ARGV[9] == "1" then redis.call("SET", KEYS[7], ARGV[2] .. " " .. ARGV[7], "PX", ms(til - now)) end
redis.call("HINCRBY", KEYS[4], "uses", 1)
redis.call("HSET", KEYS[4], "opened", ARGV[2] .. " " .. ARGV[7] .. " " .. ms(now))
keep_file(KEYS[4], KEYS[5], KEYS[6], ARGV[3], tonumber(f[3]), now, math.max(til, tonumber(f[4])))
return ARGV[2]
