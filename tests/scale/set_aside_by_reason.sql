-- What was authentic, but could not be read or decrypted.
SELECT
    instance,
    reason,
    count(DISTINCT id) AS messages,
    min(received_at) AS first,
    max(received_at) AS last
FROM read_json(
    'signals/*.rejected*.jsonl',
    format = 'newline_delimited',
    columns = {received_at: 'TIMESTAMP', instance: 'VARCHAR', id: 'VARCHAR', reason: 'VARCHAR'},
    ignore_errors = true
)
WHERE reason IS NOT NULL
GROUP BY instance, reason
ORDER BY messages DESC;
