"""Schema 3: imported rows have no speed, and no longer lower the average of `acceptance_by_day`."""

STATEMENTS = (
    "DROP VIEW acceptance_by_day",
    """CREATE VIEW acceptance_by_day AS 
        SELECT substr(created, 1, 10) AS day, adapter_id, count(*) AS generations, sum(model_drafted) AS drafted,
               round(1.0 * sum(model_accepted) / nullif(sum(model_drafted), 0), 4) AS acceptance,
               round(avg(agreement), 4) AS agreement,
               round(avg(nullif(tokens_per_second, 0)), 2) AS tokens_per_second
        FROM generations GROUP BY day, adapter_id ORDER BY day, adapter_id""",
)
