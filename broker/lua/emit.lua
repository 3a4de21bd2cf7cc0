-- Logs one more frame of a streaming job and carries it to its readers. The hot path: one call a flush.
--   KEYS[1] job   KEYS[2] frames
--   ARGV[1] id    ARGV[2] attempt   ARGV[3] seq   ARGV[4] data   ARGV[5] frames_prefix
-- Returns 1, or 0 for a frame that the log has already (a lost reply).
-- Errors: NOJOB, ENDED, STALE, GAP.
--- @flags allow-oom
--- @include check
--- @include publish
local f = redis.call("HMGET", KEYS[1], "state", "attempt", "last_seq", "apis")
if f[1] ~= "streaming" or f[2] ~= ARGV[2] then
  return holds(f[1], f[2], ARGV[2], KEYS[1]) or redis.error_reply("GAP no first token before frame " .. ARGV[3])
end
local seq, last = tonumber(ARGV[3]), tonumber(f[3])
if seq <= last then return 0 end
if seq > last + 1 then return redis.error_reply("GAP " .. last .. " then " .. ARGV[3]) end

redis.call("XADD", KEYS[2], ARGV[2] .. "-" .. ARGV[3], "kind", "content", "data", ARGV[4])
redis.call("HSET", KEYS[1], "last_seq", ARGV[3])
publish(ARGV[5], f[4], ARGV[1], ARGV[2], ARGV[3], "content", ARGV[4])
return 1
