"""Pure planning: functions of sizes that give the same chunks on every rank."""
