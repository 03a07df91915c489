"""Count signals by hour and type, each signal once, from the closed segments of many receivers.

    spark-submit count_by_type.py --out DIR [--follow] SIGNALS

SIGNALS is a glob of the receivers' signals directories. `DIR/counts` gets Parquet; `DIR/checkpoint`
is what a later run goes on from. Without `--follow` it counts what is there and ends; with it,
it looks for new segments every minute. A count comes in parts, one a batch: sum them up.
"""

import argparse

from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

# Compressed, one has a new name and is read again; by then its ids are known, or too late.
CLOSED_SEGMENTS = "????????T??????.??????Z.jsonl*"

# How a line begins. That is the receiver's own and can always be read; any other line drops out.
STORED = r'^\{"received_at":"([^"]+)","instance":"[^"]+","id":"([0-9a-f]{32})","signal":'

# What Spark can't read of a signal is null, and the signal counts.
SIGNAL = "signal STRUCT<type: STRING, timestamp: DOUBLE>"
CHECK = "re.notifica.event.custom.liveapi_check"  # what `check` sends: it counts nowhere
YEAR_10000 = 253402300800000

REMEMBERED = "7 days"  # ids, by the time of receipt; README.md says why


def distinct_signals(spark: SparkSession, signals: str, segments_per_batch: int) -> DataFrame:
    lines = (
        spark.readStream.option("pathGlobFilter", CLOSED_SEGMENTS)
        .option("maxFilesPerTrigger", segments_per_batch)
        # By default a file that is a week older than the newest is passed over without a word.
        .option("maxFileAge", "3650d")
        .text(signals)
    )
    signal = F.from_json("value", SIGNAL).signal
    at = F.when(signal.timestamp.between(0, YEAR_10000 - 1), signal.timestamp.cast("long"))
    return (
        lines.where(F.col("value").rlike(STORED))
        .where(signal.type.isNull() | (signal.type != CHECK))
        .select(
            F.regexp_extract("value", STORED, 2).alias("id"),
            F.to_timestamp(F.regexp_extract("value", STORED, 1)).alias("received_at"),
            F.date_trunc("hour", F.timestamp_millis(at)).alias("hour"),
            signal.type.alias("type"),
        )
        .withWatermark("received_at", REMEMBERED)
        .dropDuplicatesWithinWatermark(["id"])
    )


def write_counts(out: str, batch: DataFrame, number: int) -> None:
    """What a batch counted, under its number: run again after a kill, it replaces its first try."""
    counts = batch.groupBy("hour", "type").agg(F.count("*").alias("signals"))
    counts.coalesce(1).write.mode("overwrite").parquet(f"{out}/counts/batch={number}")


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("signals")
    options.add_argument("--out", required=True)
    options.add_argument("--follow", action="store_true")
    options.add_argument("--segments-per-batch", type=int, default=64)
    given = options.parse_args()

    spark = (
        SparkSession.builder.appName("count signals by type")
        .config("spark.sql.session.timeZone", "UTC")
        # Remembered ids go to disk, not to the heap.
        .config(
            "spark.sql.streaming.stateStore.providerClass",
            "org.apache.spark.sql.execution.streaming.state.RocksDBStateStoreProvider",
        )
        .getOrCreate()
    )
    query = (
        distinct_signals(spark, given.signals, given.segments_per_batch)
        .writeStream.option("checkpointLocation", f"{given.out}/checkpoint")
        .trigger(**({"processingTime": "1 minute"} if given.follow else {"availableNow": True}))
        .foreachBatch(lambda batch, number: write_counts(given.out, batch, number))
        .start()
    )
    query.awaitTermination()
    lines = sum(each["numInputRows"] for each in query.recentProgress)
    states = [state for each in query.recentProgress for state in each["stateOperators"]]
    late = sum(state["numRowsDroppedByWatermark"] for state in states)
    print(f"{lines} lines read, {late} dropped because they came later than {REMEMBERED}")


if __name__ == "__main__":
    main()
