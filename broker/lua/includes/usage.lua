--- @include day
-- Begins to count for somebody on a day. Days are kept for 90 days, until a chore sets what the policy says.
local function begin_day(day, by, now)
  redis.call("EXPIRE", day .. ":" .. by, 91 * 86400)
  redis.call("HSET", day, by, ms(now))
  if redis.call("TTL", day) < 0 then redis.call("EXPIRE", day, 91 * 86400) end
end
-- Adds to a figure of a day; nothing, if the amount is 0. Each caller, lane, model asked for and model that served has a
-- small hash of its own: in one large list each counter would have to be looked for.
local function count(day, by, now, figure, amount)
  if amount <= 0 then return end
  local key = day .. ":" .. by
  if redis.call("HINCRBY", key, figure, amount) == amount and redis.call("TTL", key) < 0 then begin_day(day, by, now) end
end
-- By whom and what a job is counted.
local function counted_by(f) return f.caller .. ":" .. f.lane .. ":" .. f.asked_model .. ":" .. f.model end
-- The bucket of a first token's time: of eight in every doubling from 16 ms on (`broker/first_tokens.py`).
local function bucket_of(took_ms)
  local _, bits = math.frexp(took_ms - 1)
  local step = 2 ^ math.max(0, bits - 4)
  return ms(math.ceil(took_ms / step) * step)
end
-- How long a job that is held has held its slot.
local function running_ms(f, now)
  local held = f.state == "claimed" or f.state == "streaming"
  return held and math.max(0, now - f.claimed_at) or 0
end
-- Counts that a job was moved or put back, and for how long it held a slot; the job remembers that time.
local function count_move(day, job, f, now, what)
  local by, ran = counted_by(f), running_ms(f, now)
  count(day, by, now, what, 1)
  count(day, by, now, "running_ms", ran)
  if ran > 0 then redis.call("HINCRBY", job, "held_ms", ms(ran)) end
end
