-- wrk's script: every request carries the next signal of the pool, so no signal is sent twice.
-- A record of the pool has a fixed length: public key, signature, body (wrk.py writes them).
-- Arguments: pool file, index of the first record, the three lengths, keep or close.
-- Run with one wrk thread: each thread would read the same records.

local worker

function setup(thread)
  worker = thread
end

function init(args)
  local public, signature, body = tonumber(args[3]), tonumber(args[4]), tonumber(args[5])
  record = public + signature + body
  public_end, signature_end = public, public + signature
  pool = assert(io.open(args[1], "rb"))
  pool:seek("set", tonumber(args[2]) * record)
  before_public = "POST /live HTTP/1.1\r\nHost: 127.0.0.1\r\nUser-Agent: bench\r\n"
    .. "Content-Type: application/json\r\nContent-Length: " .. body .. "\r\n"
    .. (args[6] == "close" and "Connection: close\r\n" or "")
    .. "x-notificare-public-key: "
  before_signature = "\r\nx-notificare-signature: "
  taken = 0
end

function request()
  local signal = pool:read(record)
  if not signal then
    io.stderr:write("the pool of signals is used up\n")
    os.exit(3)
  end
  taken = taken + 1
  return before_public .. signal:sub(1, public_end) .. before_signature
    .. signal:sub(public_end + 1, signature_end) .. "\r\n\r\n" .. signal:sub(signature_end + 1)
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    'BENCH {"answered":%d,"taken":%d,"seconds":%.6f,"refused":%d,"broken":%d,"p50_us":%d,"p99_us":%d}\n',
    summary.requests, worker:get("taken"), summary.duration / 1e6, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50), latency:percentile(99)))
end
