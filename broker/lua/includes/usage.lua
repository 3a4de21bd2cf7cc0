-- The day of an instant (UTC), as YYYY-MM-DD.
local function day_of(now)
  local z = math.floor(now / 86400000) + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  return string.format("%04d-%02d-%02d", yoe + era * 400 + (month <= 2 and 1 or 0), month, day)
end
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
