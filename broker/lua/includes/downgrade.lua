-- The cap on downgrades: how many of the last `window` jobs that asked for a model are, or will be, served by another.
--   key: hash {asked = jobs so far, downgraded = downgrades among the last `window`, <number modulo window> = 1 for each}
-- A job's place is its number modulo the window: the newest job takes the place of the one that falls out.
local function place_of(number, window) return ms(number % window) end
-- Does one more downgrade keep to the share? Of job `number` (0 = it was never counted), or of one that asks now (nil).
-- Binding from `from` jobs. A job that is a downgrade already may be moved on.
local function may_downgrade(key, number, share, window, from)
  local f = redis.call("HMGET", key, "asked", "downgraded")
  local asked, downgraded = tonumber(f[1] or 0), tonumber(f[2] or 0)
  if not number then
    asked = asked + 1
    if redis.call("HEXISTS", key, place_of(asked, window)) == 1 then downgraded = downgraded - 1 end
  elseif number > 0 and asked - number < window and redis.call("HEXISTS", key, place_of(number, window)) == 1 then
    return true
  end
  local jobs = math.min(asked, window)
  return jobs < from or downgraded + 1 <= share * jobs + 0.000000001
end
-- Counts a job that asks now. Returns its number. The counters go a week after the last one.
local function count_asked(key, window, downgrade)
  local number = redis.call("HINCRBY", key, "asked", 1)
  local change = -redis.call("HDEL", key, place_of(number, window))
  if downgrade then
    redis.call("HSET", key, place_of(number, window), 1)
    change = change + 1
  end
  if change ~= 0 then redis.call("HINCRBY", key, "downgraded", change) end
  redis.call("EXPIRE", key, 7 * 86400)
  return number
end
-- Notes what a counted job's new lane makes of it, unless it has fallen out of the window.
local function count_moved(key, number, window, downgrade)
  local asked = tonumber(redis.call("HGET", key, "asked") or 0)
  if number > asked or asked - number >= window then return end
  local place = place_of(number, window)
  if downgrade then
    if redis.call("HSETNX", key, place, 1) == 1 then redis.call("HINCRBY", key, "downgraded", 1) end
  elseif redis.call("HDEL", key, place) == 1 then
    redis.call("HINCRBY", key, "downgraded", -1)
  end
end
-- Notes that a session stays on the fallback of the model that it asked for: from its first downgrade, for `for_ms`.
local function stick(key, session, now, for_ms)
  if for_ms <= 0 or not session or session == "" then return end
  redis.call("ZREMRANGEBYSCORE", key, "-inf", ms(now))
  redis.call("ZADD", key, "NX", ms(now + for_ms), session)
  redis.call("PEXPIRE", key, ms(for_ms))
end
