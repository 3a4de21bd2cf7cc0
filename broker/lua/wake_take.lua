-- Takes the wake lock of a model, with a new fencing epoch. Who asks again with the epoch that it holds, keeps it.
--   KEYS[1] lock   KEYS[2] epoch
--   ARGV[1] host   ARGV[2] boot   ARGV[3] ttl_ms   ARGV[4] epoch held before, 0 = none
-- A holder of the same host but another boot is dead (one worker per host, proved by a local lock): its lock is broken.
-- Returns the epoch.
-- Errors: HELD.
--- @flags allow-oom
local held = redis.call("GET", KEYS[1])
local mine = ARGV[1] .. "/" .. ARGV[2] .. "/" .. ARGV[4]
if held and held ~= mine then
  local host, boot = string.match(held, "^(.*)/([^/]*)/[^/]*$")
  if host ~= ARGV[1] or boot == ARGV[2] then return redis.error_reply("HELD " .. held) end
end

local epoch = tonumber(ARGV[4])
if epoch ~= 0 and (redis.call("GET", KEYS[2]) or "0") ~= ARGV[4] then
  return redis.error_reply("HELD epoch " .. ARGV[4] .. " has passed")
end

if epoch == 0 then epoch = redis.call("INCR", KEYS[2]) end
redis.call("SET", KEYS[1], ARGV[1] .. "/" .. ARGV[2] .. "/" .. epoch, "PX", ARGV[3])
return epoch
