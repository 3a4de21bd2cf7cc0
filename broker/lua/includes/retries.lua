-- The index of the jobs that an SDK's retry may still come back to: members `<fingerprint>/<id>`, with `/<reader>` behind
-- one whose answer a retry has fetched, and for each the instant
-- until which it may, "+inf" while the job lives. The key goes when its last member has.
local RETRY_MS = 60000
-- Notes a job that has come in.
local function note_retries(index, now, fingerprint, id)
  redis.call("ZREMRANGEBYSCORE", index, "-inf", ms(now))
  redis.call("ZADD", index, "+inf", fingerprint .. "/" .. id)
  redis.call("PERSIST", index)
end
-- Notes that a job has ended: an answer that nobody heard may be fetched for a while, any other end frees the request.
local function settle_retries(index, now, fingerprint, id, unheard)
  local member = fingerprint .. "/" .. id
  if unheard then redis.call("ZADD", index, "XX", ms(now + RETRY_MS), member) else redis.call("ZREM", index, member) end
  if redis.call("ZCOUNT", index, "+inf", "+inf") == 0 then redis.call("PEXPIRE", index, ms(RETRY_MS)) end
end
