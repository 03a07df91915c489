-- Who opened which notification. count(DISTINCT id): a signal that two receivers hold counts once.
SELECT
    signal ->> '$.data.notification' AS notification,
    count(DISTINCT id) AS opens,
    count(DISTINCT signal ->> '$.data.deviceID') AS devices
FROM read_ndjson(
    'signals/*.jsonl*', columns = {id: 'VARCHAR', signal: 'JSON'}, ignore_errors = true
)
WHERE signal ->> '$.type' = 're.notifica.event.notification.Open'
GROUP BY notification
ORDER BY opens DESC, notification;
