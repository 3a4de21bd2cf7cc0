-- Adds to a counter of the day (UTC). Days are kept for 90 days.
local function usage(prefix, now, field, amount)
  local days = math.floor(now / 86400000)
  local z = days + 719468
  local era = math.floor(z / 146097)
  local doe = z - era * 146097
  local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
  local doy = doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))
  local mp = math.floor((5 * doy + 2) / 153)
  local day = doy - math.floor((153 * mp + 2) / 5) + 1
  local month = mp < 10 and mp + 3 or mp - 9
  local year = yoe + era * 400 + (month <= 2 and 1 or 0)
  local key = prefix .. string.format("%04d-%02d-%02d", year, month, day)
  redis.call("HINCRBY", key, field, amount)
  redis.call("EXPIRE", key, 90 * 86400)
end
