--- @include day
-- What a caller has spent today (UTC), in tokens that were computed for it: read anew or made. Kept for two days.
local DAY_MS = 86400000
local function spent_key(root, caller, now) return root .. "spent:" .. caller .. ":" .. day_of(now) end
local function spent_today(root, caller, now) return tonumber(redis.call("GET", spent_key(root, caller, now)) or 0) end
local function next_day(now) return (math.floor(now / DAY_MS) + 1) * DAY_MS end
local function spend(root, caller, now, tokens)
  if tokens <= 0 then return end
  local key = spent_key(root, caller, now)
  if redis.call("INCRBY", key, ms(tokens)) == tokens then redis.call("PEXPIRE", key, ms(2 * DAY_MS)) end
end
