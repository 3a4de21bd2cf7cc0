-- Moves a job that has no first token yet into its fallback lane: no other model finishes the sentence of one that has.
-- It takes no place there that is another caller's: who floods a lane would have all of its fallback's too.
--   KEYS[1] from_lane   KEYS[2] to_lane   KEYS[3] job   KEYS[4] due   KEYS[5] policy   KEYS[6] model of the target
--   KEYS[7] downgrades   KEYS[8] sticky   both of the model that the job asked for
--   KEYS[9 ..] the target model's hashes on its hosts, then all lanes of the target model
--   ARGV[1] now   ARGV[2] id   ARGV[3] group   ARGV[4] policy_version   ARGV[5] from_name   ARGV[6] entry
--   ARGV[7] attempt   ARGV[8] to_name   ARGV[9] to_model   ARGV[10] max_queue   ARGV[11] promote_after_ms, 0 = no further
--   ARGV[12] target_trust   ARGV[13] hosts   ARGV[14] wanted_for_ms   ARGV[15] control_prefix   ARGV[16] usage_prefix
--   ARGV[17] max_share of downgrades, 1 = no cap   ARGV[18] window   ARGV[19] binding_from
--   ARGV[20] sticky_ms, 0 = its session does not stay on the fallback
-- Returns the new entry.
-- Errors: STALEPOLICY, NOJOB, ENDED, BADTRANSITION, MOVED, STALE, SEEN, TRUSTZONE, LANEFULL, DOWNGRADES.
--- @flags allow-oom
--- @include now_ms
--- @include check
--- @include schedule
--- @include enter
--- @include want
--- @include usage
--- @include downgrade
--- @include share
local now, id, group = now_ms(ARGV[1]), ARGV[2], ARGV[3]
local stale = same_policy(KEYS[5], ARGV[4])
if stale then return stale end
local f = redis.call("HMGET", KEYS[3], "attempt", "state", "owner", "give_up_at", "lane", "entry", "asked_model",
  "asked_number", "session", "continues", "caller", "model", "claimed_at", "priority", "max_running")
local to, refusal = follow(f[2], "promote", KEYS[3])
if not to then return refusal end
local elsewhere = placed(f[5], f[6], ARGV[5], ARGV[6])
if elsewhere then return elsewhere end
if f[1] ~= ARGV[7] then return redis.error_reply("STALE attempt " .. ARGV[7] .. ", job is at " .. f[1]) end
if tonumber(f[10] or 0) > 0 then return redis.error_reply("SEEN " .. id) end
if ARGV[12] == "remote" then -- whoever allowed the request to leave asked for that lane itself, or spilled there
  return redis.error_reply("TRUSTZONE " .. id .. " may not be promoted out of the machine")
end
local hosts = tonumber(ARGV[13])
local root = root_of(KEYS[3], id)
if in_its_way(KEYS[2], group, tonumber(ARGV[10]), root, ARGV[8], f[11], now, f[14], f[15], 9, 8 + hosts, 9 + hosts, #KEYS)
then
  return redis.error_reply("LANEFULL " .. KEYS[2])
end
local downgrade, number, max_share, window = f[7] ~= ARGV[9], tonumber(f[8] or 0), tonumber(ARGV[17]), tonumber(ARGV[18])
if downgrade and max_share < 1 and not may_downgrade(KEYS[7], number, max_share, window, tonumber(ARGV[19])) then
  return redis.error_reply("DOWNGRADES " .. f[7])
end
local was = { state = f[2], caller = f[11], lane = f[5], asked_model = f[7], model = f[12], claimed_at = f[13] }

leave(KEYS[1], group, ARGV[6])
hold_no_more(root, f[11], f[5], id, f[2])
hold_waiting(root, f[11], ARGV[8], id)
local promote_at = tonumber(ARGV[11]) > 0 and math.min(now + tonumber(ARGV[11]), tonumber(f[4])) or 0
redis.call("HSET", KEYS[3], "state", to, "lane", ARGV[8], "model", ARGV[9], "promote_at", ms(promote_at),
  "retry_at", "0", "promoted_at", ms(now), "queued_at", ms(now), "owner", "", "boot", "", "lease_until", "0")
redis.call("HINCRBY", KEYS[3], "promotions", 1)
local entry = enter(KEYS[2], group, KEYS[3], id)
redis.call("HSET", KEYS[3], "entry", entry)
schedule(KEYS[4], KEYS[3], id)
if number > 0 then count_moved(KEYS[7], number, window, downgrade) end
if downgrade then stick(KEYS[8], f[9], now, tonumber(ARGV[20])) end
want(KEYS[6], now, tonumber(ARGV[14]))
if f[2] == "claimed" then redis.call("PUBLISH", ARGV[15] .. f[3], "stop " .. id .. " " .. f[1]) end
count_move(ARGV[16] .. day_of(now), KEYS[3], was, now, "promoted/" .. ARGV[8])
return entry
