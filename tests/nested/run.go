package main
import ("context";"flag")
type runOptions struct{}
func (o *runOptions) flags(fs *flag.FlagSet) {}
func (e env) runSuites(ctx context.Context, o runOptions, pkgs []string) (int, error) { return 0, nil }
func (e env) runLocal(ctx context.Context, o runOptions, pkgs []string) (int, error) { return 0, nil }
