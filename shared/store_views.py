"""SQL of the views that schema 2 brought: what an adapter came from, what the gate said of it, when and by whom it was used.

Text only; the store runs it. A released view is never changed in place: a new schema drops and makes it anew.
"""

_SCORE = """(SELECT {what} FROM evaluations e WHERE e.training_run_id = t.id AND e.subject = '{subject}'
                 AND e.adapter_id {which} t.parent_id ORDER BY n LIMIT 1)"""


def _score(subject: str, which: str, what: str = "round(agreement, 4)") -> str:
    return _SCORE.format(subject=subject, which=which, what=what)


def _detail(name: str) -> str:
    return _score("heldout", "<>", f"round(json_extract(e.details, '$.{name}'), 4)")


# one row a run of the trainer, imports included; parent_id is what the candidate was compared with
ADAPTER_HISTORY = f"""
    SELECT t.created, t.verdict, t.adapter_id, t.parent_id, t."trigger" AS caused_by,
           json_extract(t.settings, '$.data.failures') AS failures,
           json_extract(t.settings, '$.data.successes') AS successes,
           json_extract(t.settings, '$.data.replay') AS replay,
           t.examples, t.steps, t.tokens, round(t.loss_first, 4) AS loss_first, round(t.loss_last, 4) AS loss_last,
           {_score("heldout", "=")} AS heldout_before, {_score("heldout", "<>")} AS heldout_after,
           {_detail("low")} AS gain_low, {_detail("high")} AS gain_high,
           {_score("heldout", "<>", "generations")} AS heldout_generations,
           {_score("regression", "=")} AS regression_before, {_score("regression", "<>")} AS regression_after,
           (SELECT count(*) FROM activations a WHERE a.event = 'activated' AND a.adapter_id = t.adapter_id
             AND t.adapter_id <> '') AS activations,
           t.reason, t.id AS run_id
    FROM training_runs t ORDER BY t.created_at DESC"""

# who: promoted (by the gate), by hand, restart (the daemon came back), watch (it was rolled back)
ADAPTER_ACTIVATIONS = """
    SELECT created, adapter_id, event,
           CASE WHEN event = 'rolled_back' OR reason LIKE 'adapter % was rolled back' THEN 'watch'
                WHEN reason LIKE '%by hand%' THEN 'by hand'
                WHEN reason = 'restart' THEN 'restart'
                WHEN event = 'rejected' THEN 'verification'
                ELSE 'promoted' END AS who,
           previous_id, reason
    FROM activations ORDER BY n"""
