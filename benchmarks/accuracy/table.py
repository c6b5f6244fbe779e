def write_table(store, results, readme):
    return ""
