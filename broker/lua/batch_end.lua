-- Ends a batch of which no line is being worked off. Its input may be deleted from here on.
--   KEYS[1] batch          KEYS[2] window    KEYS[3] names
--   KEYS[4] batches        KEYS[5] batches_of   its caller        KEYS[6] file         its input
--   KEYS[7] output         KEYS[8] output_parts                   KEYS[9] error        KEYS[10] error_parts
--   KEYS[11] files         of its caller
--   ARGV[1] now            ARGV[2] batch_id  ARGV[3] state        that it ends in
--   ARGV[4] errors         why it failed, ""  otherwise           ARGV[5] output_id    ARGV[6] error_id
-- Returns the state of the batch.
-- Errors: NOBATCH, MOVED.
--- @flags allow-oom
--- @include now_ms
--- @include batch_files
local now, b, state = now_ms(ARGV[1]), read_batch(KEYS[1]), ARGV[3]
if not b then return redis.error_reply("NOBATCH " .. ARGV[2]) end
if BATCH_ENDED[b.state] then return b.state end
local ending = b.ending or ""
local whole = b.read_all == "1" or ending == "cancelled" or state == "failed"
local meant = state == "failed" or state == (ending ~= "" and ending or "completed")
if not whole or not meant or redis.call("EXISTS", KEYS[2]) == 1 then return redis.error_reply("MOVED " .. b.state) end

local til = now + tonumber(b.keep_ms)
redis.call("HSET", KEYS[1], "state", state, state .. "_at", ms(now), "errors", ARGV[4])
if state == "completed" then redis.call("HSET", KEYS[1], "finalizing_at", ms(now)) end
redis.call("PEXPIRE", KEYS[1], ms(til - now))
redis.call("DEL", KEYS[3])
redis.call("ZREM", KEYS[4], ARGV[2])
redis.call("ZADD", KEYS[5], ms(til), ARGV[2])
if redis.call("EXISTS", KEYS[6]) == 1 then redis.call("HINCRBY", KEYS[6], "uses", -1) end
for _, k in ipairs({ { KEYS[7], KEYS[8], ARGV[5] }, { KEYS[9], KEYS[10], ARGV[6] } }) do
  local bytes = redis.call("HGET", k[1], "bytes")
  if bytes then
    redis.call("HSET", k[1], "uses", "0")
    keep_file(k[1], k[2], KEYS[11], k[3], tonumber(bytes), now, til)
  end
end
return state
