--- @include day
-- Adds to counters of the day: field and amount in turn. Days are kept for 90 days.
local function usage(prefix, now, ...)
  local key, first = prefix .. day_of(now), false
  for i = 1, select("#", ...), 2 do
    local field, amount = select(i, ...)
    amount = tonumber(amount)
    if amount > 0 and redis.call("HINCRBY", key, field, amount) == amount then first = true end
  end
  -- a counter that begins may begin the day
  if first and redis.call("TTL", key) < 0 then redis.call("EXPIRE", key, 90 * 86400) end
end
