-- Makes, replaces or takes away a secret that a caller's webhooks are signed with.
--   KEYS[1] webhook_secrets
--   ARGV[1] now   ARGV[2] wish   new, rotate or revoke   ARGV[3] secret_id   ARGV[4] secret
--   ARGV[5] overlap_ms   how long the replaced ones sign beside the new one   ARGV[6] most   that sign at once
-- Returns "done"; "exists" where there is one already, "none" where there is none, "many" where too many sign still.
--- @flags allow-oom
--- @include now_ms
local now, wish = now_ms(ARGV[1]), ARGV[2]
local all, live, gone = redis.call("HGETALL", KEYS[1]), {}, {}
for i = 1, #all, 2 do
  local secret, made_at, ends_at = string.match(all[i + 1], "^(%S+) (%d+) (%d+)$")
  if tonumber(ends_at) > 0 and tonumber(ends_at) <= now then gone[#gone + 1] = all[i]
  else live[#live + 1] = { all[i], secret, made_at, tonumber(ends_at) } end
end
if wish == "new" and #live > 0 then return "exists" end
if wish == "rotate" and #live == 0 then return "none" end
if wish == "rotate" and #live >= tonumber(ARGV[6]) and ARGV[5] ~= "0" then return "many" end
if wish == "revoke" and redis.call("HEXISTS", KEYS[1], ARGV[3]) == 0 then return "none" end

for _, id in ipairs(gone) do redis.call("HDEL", KEYS[1], id) end
if wish == "revoke" then
  redis.call("HDEL", KEYS[1], ARGV[3])
  return "done"
end
local overlap_ms = tonumber(ARGV[5])
for _, s in ipairs(live) do
  local ends_at = now + overlap_ms
  if s[4] > 0 then ends_at = math.min(s[4], ends_at) end
  if overlap_ms == 0 then redis.call("HDEL", KEYS[1], s[1])
  else redis.call("HSET", KEYS[1], s[1], s[2] .. " " .. s[3] .. " " .. ms(ends_at)) end
end
redis.call("HSET", KEYS[1], ARGV[3], ARGV[4] .. " " .. ms(now) .. " 0")
return "done"
