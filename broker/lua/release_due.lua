-- Moves a scheduled job whose start has come into its lane, as if it were submitted then.
--   KEYS[1] lane   KEYS[2] job   KEYS[3] due   KEYS[4] policy   KEYS[5] model
--   KEYS[6 ..] the model's hashes on its hosts, then all lanes of the model
--   ARGV[1] now   ARGV[2] id   ARGV[3] group   ARGV[4] policy_version   ARGV[5] lane_name   ARGV[6] max_queue
--   ARGV[7] promote_after_ms, 0 = never   ARGV[8] hosts   ARGV[9] wanted_for_ms, 0 = do not wake
-- Returns the entry.
-- Errors: STALEPOLICY, NOJOB, ENDED, BADTRANSITION, MOVED, NOTDUE, CALLERLIMIT, LANEFULL, CALLERSHARE.
--- @flags allow-oom
--- @include now_ms
--- @include check
--- @include schedule
--- @include enter
--- @include want
--- @include share
local now, id, group = now_ms(ARGV[1]), ARGV[2], ARGV[3]
local stale = same_policy(KEYS[4], ARGV[4])
if stale then return stale end
local f = redis.call("HMGET", KEYS[2], "not_before", "give_up_at", "state", "lane", "entry", "caller", "priority",
  "max_running", "max_waiting")
local to, refusal = follow(f[3], "release_due", KEYS[2])
if not to then return refusal end
local elsewhere = placed(f[4], f[5], ARGV[5], "")
if elsewhere then return elsewhere end
if tonumber(f[1]) > now then return redis.error_reply("NOTDUE " .. f[1]) end
local hosts = tonumber(ARGV[8])
local root = root_of(KEYS[2], id)
if waits_as_may(root, f[6], tonumber(f[9] or 0)) then return redis.error_reply("CALLERLIMIT " .. f[6]) end
local none = no_place(KEYS[1], group, tonumber(ARGV[6]), root, f[4], f[6], now, f[7], f[8], 6, 5 + hosts,
  6 + hosts, #KEYS)
if none then return none end

local promote_at = tonumber(ARGV[7]) > 0 and math.min(now + tonumber(ARGV[7]), tonumber(f[2])) or 0
redis.call("HSET", KEYS[2], "promote_at", ms(promote_at), "retry_at", "0")
local entry = enter(KEYS[1], group, KEYS[2], id)
redis.call("HSET", KEYS[2], "state", to, "entry", entry, "queued_at", ms(now))
schedule(KEYS[3], KEYS[2], id)
note_place(root, f[4], f[6], now)
hold_no_more(root, f[6], f[4], id, f[3], f[1])
hold_waiting(root, f[6], f[4], id)
want(KEYS[5], now, tonumber(ARGV[9]))
return entry
