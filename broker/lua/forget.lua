-- Deletes an ended job with all that is kept of it. What was counted and what the dead letters say of it stays.
--   KEYS[1] job   KEYS[2] request   KEYS[3] frames
--   ARGV[1] now   ARGV[2] id
-- Returns 1.
-- Errors: NOJOB, NOTDUE.
--- @flags allow-oom
--- @include now_ms
--- @include retries
local f = redis.call("HMGET", KEYS[1], "state", "ended_at", "idem", "retries")
if not f[1] then return redis.error_reply("NOJOB " .. KEYS[1]) end
if tonumber(f[2] or 0) == 0 then return redis.error_reply("NOTDUE it is " .. f[1]) end
local now, id, idem, retries = now_ms(ARGV[1]), ARGV[2], f[3] or "", f[4] or ""

redis.call("DEL", KEYS[1], KEYS[2], KEYS[3])
if idem ~= "" and string.sub(redis.call("GET", idem) or "", 1, #id + 1) == id .. " " then redis.call("DEL", idem) end
if retries ~= "" then
  local index, fingerprint = string.match(retries, "^(%S+) (%S+)$")
  settle_retries(index, now, fingerprint, id, false)
end
return 1
