"""What is asked of Optuna's tables in our own words: where its own calls would be many, or two steps instead of one."""

from sqlalchemy import text

LEASE = text(
    "SELECT t.state, o.value_json FROM trials t "
    "LEFT JOIN trial_user_attributes o ON o.trial_id = t.trial_id AND o.key = 'owner' "
    "WHERE t.trial_id = :trial FOR SHARE OF t"
)
"""State and owner of a trial, which stays as it is until the transaction ends."""
BEAT = text(
    "INSERT INTO trial_heartbeats (trial_id, heartbeat) VALUES (:trial, timezone('utc', clock_timestamp())) "
    "ON CONFLICT (trial_id) DO UPDATE SET heartbeat = excluded.heartbeat"
)
"""A heartbeat now, by the database's clock, in a time that no season and no client's zone changes."""
TAKE = text(
    "INSERT INTO trial_user_attributes (trial_id, key, value_json) "
    "SELECT t.trial_id, 'owner', :owner FROM trials t WHERE t.trial_id = :trial AND t.state = 'RUNNING' FOR SHARE OF t "
    "ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json "
    "WHERE trial_user_attributes.value_json = 'null'"
)
"""A running trial that nobody owns has this owner, and stays as it is until the transaction ends."""
SET = text(
    "INSERT INTO trial_user_attributes (trial_id, key, value_json) "
    "SELECT t.trial_id, e.key, e.value::text FROM trials t, json_each(CAST(:values AS json)) e "
    "WHERE t.trial_id = :trial "
    "ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json"
)
"""Attributes of a trial, a JSON object of them at once; its state was looked at in the same transaction."""
WAIT = text("UPDATE trials SET state = 'WAITING' WHERE trial_id = :trial AND state = 'RUNNING'")
"""A running trial waits."""
FAIL = text(
    "UPDATE trials SET state = 'FAIL', datetime_complete = timezone('utc', clock_timestamp()) "
    "WHERE trial_id = :trial AND state IN ('RUNNING', 'WAITING')"
)
"""A trial that has not ended fails."""
SET_ASIDE = text(
    "UPDATE trial_system_attributes SET key = :before || key WHERE trial_id = :trial AND key LIKE 'completed_rung_%'"
)
"""What a pruner that halves has noted of a trial gets other names: it counts those of all trials, whatever became of
them."""
ONE_VIEW = text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
"""First in a transaction: all its statements see the same moment."""
OPEN = text(
    "SELECT t.trial_id, t.state, r.value_json, e.value_json FROM trials t "
    "LEFT JOIN trial_user_attributes r ON r.trial_id = t.trial_id AND r.key = 'role' "
    "LEFT JOIN trial_user_attributes e ON e.trial_id = t.trial_id AND e.key = 'enqueued' "
    "WHERE t.study_id = :study AND t.state IN ('WAITING', 'RUNNING') ORDER BY t.number"
)
"""All trials that wait or run: id, state, role, whether a person put it there."""
ENDED = text(
    "SELECT count(*) FROM trials t LEFT JOIN trial_user_attributes r ON r.trial_id = t.trial_id AND r.key = 'role' "
    "WHERE t.study_id = :study AND t.trial_id > :after AND t.trial_id < :before "
    "AND t.state IN ('COMPLETE', 'PRUNED') AND coalesce(r.value_json, :search) = :search"
)
"""How many searched trials ended COMPLETE or PRUNED, of a range of ids."""
# A heartbeat is judged by the database's clock. While the server was down nobody could send one.
RUNNING = text(
    "SELECT t.trial_id, t.number, o.value_json, "
    "CASE WHEN h.heartbeat IS NOT NULL THEN "
    "EXTRACT(EPOCH FROM LEAST(timezone('utc', clock_timestamp()) - h.heartbeat, "
    "clock_timestamp() - pg_postmaster_start_time())) END "
    "FROM trials t LEFT JOIN trial_heartbeats h ON h.trial_id = t.trial_id "
    "LEFT JOIN trial_user_attributes o ON o.trial_id = t.trial_id AND o.key = 'owner' "
    "WHERE t.study_id = :study AND t.state = 'RUNNING'"
)
"""Running trials: id, number, owner, seconds of silence or null."""
UNRETRIED = text(
    "SELECT t.trial_id, t.number FROM trials t "
    "JOIN trial_user_attributes r ON r.trial_id = t.trial_id AND r.key = 'retry' AND r.value_json = 'true' "
    "WHERE t.study_id = :study AND t.state = 'FAIL' ORDER BY t.number"
)
"""Failed trials that are to be tried again."""
RETRIES = text(
    "SELECT s.value_json FROM trial_system_attributes s JOIN trials t ON t.trial_id = s.trial_id "
    "WHERE t.study_id = :study AND s.key = 'retry_history'"
)
"""Of each retry, the numbers of the trials before it."""
