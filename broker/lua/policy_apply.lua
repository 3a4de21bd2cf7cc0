-- Makes a policy the active one, if nobody changed it since it was read.
--   KEYS[1] policy
--   ARGV[1] now   ARGV[2] expected_version   ARGV[3] text   ARGV[4] digest   ARGV[5] by   ARGV[6] made_up
--   ARGV[7] keep, versions of history   ARGV[8] anew, 1 = whoever calls cannot read the active one
--   ARGV[9 ..] retiring lanes, name and definition in turn
-- Returns the version; the same policy again changes nothing, unless it is made anew.
-- Errors: STALEPOLICY.
--- @flags allow-oom
--- @include now_ms
local f = redis.call("HMGET", KEYS[1], "version", "digest")
local version = f[1] or "0"
if version ~= ARGV[2] then return redis.error_reply("STALEPOLICY " .. version) end
if f[2] == ARGV[4] and ARGV[8] ~= "1" then return tonumber(version) end

local new = tonumber(version) + 1
local at = ms(now_ms(ARGV[1]))
redis.call("HSET", KEYS[1], "version", new, "text", ARGV[3], "digest", ARGV[4], "applied_at", at, "applied_by", ARGV[5],
  "made_up", ARGV[6], "history:" .. new,
  cjson.encode({ version = new, text = ARGV[3], digest = ARGV[4], applied_at = at, applied_by = ARGV[5] }))
redis.call("HDEL", KEYS[1], "history:" .. (new - tonumber(ARGV[7])))
for _, field in ipairs(redis.call("HKEYS", KEYS[1])) do
  if string.sub(field, 1, 9) == "retiring:" then redis.call("HDEL", KEYS[1], field) end
end
for i = 9, #ARGV, 2 do redis.call("HSET", KEYS[1], "retiring:" .. ARGV[i], ARGV[i + 1]) end
redis.call("HINCRBY", KEYS[1], "revision", 1)
return new
