--- @include places
-- Makes sure the lane and its group exist, and adds the job's entry to it. Returns the entry id.
-- The entry repeats what the choice of the next job needs, so that workers choose without reading hashes.
local function add_entry(lane, group, id, caller, session, promote_at, submitted_at, tokens, priority, zone)
  local function add()
    return redis.call("XADD", lane, "NOMKSTREAM", "*", "job", id, "caller", caller, "session", session, "promote_at",
      promote_at, "submitted", submitted_at, "tokens", tokens, "priority", priority, "zone", zone)
  end
  local entry = add()
  if entry then return entry end
  redis.call("XGROUP", "CREATE", lane, group, "0", "MKSTREAM")
  return add()
end
local function enter(lane, group, job, id)
  local f = redis.call("HMGET", job, "caller", "session", "promote_at", "submitted_at", "tokens", "priority", "zone")
  return add_entry(lane, group, id, f[1], f[2], f[3], f[4], f[5], f[6], f[7])
end
local function leave(lane, group, entry)
  redis.call("XACK", lane, group, entry)
  redis.call("XDEL", lane, entry)
end
-- Puts a held job back to wait in its own lane, under a new entry that every tailing worker sees. The stream is as
-- long as before: it takes back the place that it held. What was logged of the lost answer is dropped, or, with
-- `continue_by`, stands: another attempt goes on from the frames up to attempt `continues`, if it comes until then.
local function put_back(lane, group, due, frames, job, id, now, continues, continue_by)
  local f = redis.call("HMGET", job, "entry", "caller", "lane", "state")
  local root = root_of(job, id)
  leave(lane, group, f[1])
  hold_no_more(root, f[2], f[3], id, f[4])
  hold_waiting(root, f[2], f[3], id)
  local entry = enter(lane, group, job, id)
  redis.call("HSET", job, "state", "queued", "entry", entry, "owner", "", "boot", "", "lease_until", "0",
    "retry_at", "0", "requeued_at", ms(now))
  if continue_by then
    redis.call("HSET", job, "continues", continues, "continue_by", ms(continue_by))
  else
    redis.call("HSET", job, "first_token_at", "0")
    if redis.call("EXISTS", frames) == 1 then redis.call("XTRIM", frames, "MAXLEN", "0") end
  end
  schedule(due, job, id)
  return entry
end
