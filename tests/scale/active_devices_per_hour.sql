-- By the signals' own time, UTC. A paused instance sends late, so the time of receipt won't do.
-- What `check` sends is no signal of an app, and does not count.
SELECT
    date_trunc('hour', TRY(make_timestamp_ms(CAST(signal ->> '$.timestamp' AS BIGINT)))) AS hour,
    count(DISTINCT signal ->> '$.data.deviceID') AS devices,
    count(DISTINCT id) AS signals
FROM read_ndjson(
    'signals/*.jsonl*', columns = {id: 'VARCHAR', signal: 'JSON'}, ignore_errors = true
)
WHERE
    signal ->> '$.data.deviceID' IS NOT NULL
    AND signal ->> '$.type' IS DISTINCT FROM 're.notifica.event.custom.liveapi_check'
GROUP BY hour
ORDER BY hour;
