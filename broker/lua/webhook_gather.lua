-- Makes a delivery of an event of the outbox. Sending it again is harmless: the entry goes in the same step.
--   KEYS[1] outbox   KEYS[2] webhook   KEYS[3] webhook_line   KEYS[4] webhook_due   KEYS[5] webhooks
--   KEYS[6] webhook_endpoint   KEYS[7] own_list   KEYS[8] all_list
--   ARGV[1] now   ARGV[2] entry   ARGV[3] delivery   ARGV[4] endpoint   ARGV[5] at, when the job ended
--   ARGV[6] listed_max   ARGV[7] listed_ms
--   ARGV[8 ..] fields of the delivery, name and value in turn
-- Returns 1, or 0 where the entry is gone.
--- @flags allow-oom
--- @include now_ms
--- @include webhook_line
local now = now_ms(ARGV[1])
if #redis.call("XRANGE", KEYS[1], ARGV[2], ARGV[2]) == 0 then return 0 end

redis.call("XDEL", KEYS[1], ARGV[2])
redis.call("HSET", KEYS[2], "id", ARGV[3], "endpoint", ARGV[4], "at", ARGV[5], "state", "pending", "since", ms(now),
  "next_at", ms(now), "attempt", "0", "tries", "0")
for i = 8, #ARGV, 2 do redis.call("HSET", KEYS[2], ARGV[i], ARGV[i + 1]) end
line_up(KEYS[3], KEYS[4], ARGV[3], now)
look_at(KEYS[5], KEYS[4], KEYS[6], ARGV[4])
for _, list in ipairs({ KEYS[7], KEYS[8] }) do
  redis.call("ZADD", list, ARGV[5], ARGV[3])
  redis.call("ZREMRANGEBYRANK", list, 0, -1 - tonumber(ARGV[6]))
  redis.call("PEXPIRE", list, ARGV[7])
end
return 1
