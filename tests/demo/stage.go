package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"testing"
)

// stage is what the harness, which is made for tests, takes the demo for. What fails ends the
// scene; what was set up is undone at its end.
type stage struct {
	testing.TB // for what the harness does not call
	ctx        context.Context
	name       string

	mu      sync.Mutex
	undo    []func()
	failure error
}

// halt ends a scene.
type halt struct{}

// scene runs f, and undoes what it has set up.
func scene(ctx context.Context, name string, f func(*stage)) error {
	ctx, cancel := context.WithCancel(ctx)
	s := &stage{ctx: ctx, name: name}
	defer cancel()
	func() {
		defer s.end()
		defer func() {
			if r := recover(); r != nil && r != any(halt{}) {
				panic(r)
			}
		}()
		f(s)
	}()
	if s.failure != nil {
		return fmt.Errorf("%s: %w", name, s.failure)
	}
	return ctx.Err()
}

func (s *stage) end() {
	for {
		s.mu.Lock()
		n := len(s.undo)
		if n == 0 {
			s.mu.Unlock()
			return
		}
		f := s.undo[n-1]
		s.undo = s.undo[:n-1]
		s.mu.Unlock()
		f()
	}
}

func (s *stage) fail(text string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failure = errors.Join(s.failure, errors.New(text))
}

// What the harness calls: see testing.TB.

func (s *stage) Helper()                   {}
func (s *stage) Name() string              { return s.name }
func (s *stage) Context() context.Context  { return s.ctx }
func (s *stage) Log(...any)                {}
func (s *stage) Logf(string, ...any)       {}
func (s *stage) Error(args ...any)         { s.fail(fmt.Sprint(args...)) }
func (s *stage) Errorf(f string, a ...any) { s.fail(fmt.Sprintf(f, a...)) }
func (s *stage) Fatal(args ...any)         { s.Error(args...); panic(halt{}) }
func (s *stage) Fatalf(f string, a ...any) { s.Errorf(f, a...); panic(halt{}) }
func (s *stage) Skip(args ...any)          { s.Fatal(args...) }
func (s *stage) Skipf(f string, a ...any)  { s.Fatalf(f, a...) }
func (s *stage) Attr(string, string)       {}

func (s *stage) Failed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.failure != nil
}

func (s *stage) Cleanup(f func()) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.undo = slices.Concat(s.undo, []func(){f})
}

func (s *stage) TempDir() string {
	dir, err := os.MkdirTemp("", "baton-demo-")
	if err != nil {
		s.Fatal(err)
	}
	s.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}
