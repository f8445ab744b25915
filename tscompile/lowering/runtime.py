def launch(plan, group_name, args, reference): return reference()
def begin(manifest): pass
