-- The clock: "0" asks the server, anything else is a test's virtual milliseconds.
local function now_ms(arg)
  if arg ~= "0" then return tonumber(arg) end
  local t = redis.call("TIME")
  return tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
end
-- Milliseconds as Redis should store them: never in scientific notation.
local function ms(number) return string.format("%.0f", number) end
