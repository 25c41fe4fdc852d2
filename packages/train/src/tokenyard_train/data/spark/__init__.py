"""Pack a Spark DataFrame into a folder of token ids. Executors tokenize its partitions."""

from tokenyard_train.data.spark.driver import pack

__all__ = ["pack"]
