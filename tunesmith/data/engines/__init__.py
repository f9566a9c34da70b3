"""Who does the work of the data stage: processes of this machine, Ray or Spark, with the same result row for row."""
