-- Counts requests that were refused at the door: an api gathers them, so that a refusal costs no trip of its own.
--   ARGV[1] now   ARGV[2] usage_prefix
--   ARGV[3 ..] whose (`<caller>:<lane>:<model>:<model>`), `refused/<code>`, and how many, in turn
-- Returns 1.
--- @include now_ms
--- @include usage
local now = now_ms(ARGV[1])
for i = 3, #ARGV, 3 do count(ARGV[2] .. day_of(now), ARGV[i], now, ARGV[i + 1], tonumber(ARGV[i + 2])) end
return 1
