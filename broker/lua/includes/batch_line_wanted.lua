-- Whether the line that a job is for is still being worked off: in the window of a batch that goes on.
local function worked_off(root, batch, id)
  local key = root .. "batch:" .. batch
  local ending = redis.call("HGET", key, "ending") or ""
  return ending == "" and redis.call("HEXISTS", key .. ":window", string.sub(id, #batch + 2)) == 1
end
