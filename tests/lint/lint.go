// Package lint checks what the Go tools do not: that imports go along the arrows of the
// layout, that unsafe code is where it says it is, that every public name has a comment, that no
// file grows without end, and that nothing is kept that nobody wrote, such as a debugger's core.
//
//	main ──> vmm ──> {migrate, boot, devices} ──> kvm/guestmem
//	          └────> kvm
package lint

import (
	"bytes"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path"
	"strconv"
	"strings"
)

// module is the path of the module whose files are checked.
const module = "baton"

const (
	// MaxLines is how long a file outside tests may be.
	MaxLines = 600
	// MaxBytes is how large any file may be, of whatever kind.
	MaxBytes = 256 << 10
)

// A rule says what the packages of one folder, and of those below that have no rule of
// their own, may import.
type rule struct {
	dir string
	// ours lists the folders of this module that they may import, each with all below it;
	// their own folder is always among them.
	ours []string
	// theirs lists the modules, or parts of them, that they may import; nil is any.
	theirs []string
	why    string
}

var rules = []rule{
	{dir: ".", ours: []string{"vmm"}, why: "main turns options into a vmm.Config; nothing else"},
	{dir: "vmm", ours: []string{"vmm", "boot", "devices", "kvm", "migrate"}, why: "vmm builds the machine from the parts"},
	{dir: "vmm/qmp", ours: []string{}, why: "qmp is the protocol; what the commands do is the machine's business"},
	{dir: "vmm/client", ours: []string{}, theirs: []string{"golang.org/x/term"}, why: "a client knows the protocol only"},
	{dir: "vmm/failover", ours: []string{}, theirs: []string{}, why: "failover decides; the machine does"},
	{dir: "vmm/timeline", ours: []string{}, theirs: []string{}, why: "timeline reads logs and writes a page"},
	{dir: "vmm/hmp", ours: []string{}, theirs: []string{"golang.org/x/term"}, why: "hmp is text; what the commands do is QMP's business"},
	{dir: "migrate", ours: []string{"kvm/guestmem"}, why: "migrate knows interfaces and guest memory only"},
	{dir: "devices", ours: []string{"kvm/guestmem"}, why: "devices reach KVM through interfaces that they declare"},
	{dir: "boot", ours: []string{"kvm/guestmem"}, why: "boot writes guest memory and returns plain values"},
	{dir: "kvm/guestmem", theirs: []string{"golang.org/x/sys"}, why: "guest memory is the bottom of the module"},
	{dir: "kvm", theirs: []string{"golang.org/x/sys/unix", "github.com/bobuhiro11/gokvm/kvm"},
		why: "kvm is system calls and the kernel's structures"},
	{dir: "tests", ours: []string{"boot", "devices", "kvm", "migrate", "vmm"}, why: "tests may use all; nobody may use them"},
}

// A Problem is one finding.
type Problem struct {
	File string
	Line int
	What string
}

// String is the finding as a compiler would print it.
func (p Problem) String() string { return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.What) }

// Check looks at every Go file of the module whose root is fsys. Test files may import
// and be what they like.
func Check(fsys fs.FS) ([]Problem, error) {
	var problems []Problem
	err := fs.WalkDir(fsys, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && name != "." {
			// Another module, or none of Go's packages (go help packages).
			if _, err := fs.Stat(fsys, path.Join(name, "go.mod")); err == nil || strings.ContainsRune("._", rune(d.Name()[0])) || d.Name() == "testdata" {
				return fs.SkipDir
			}
		}
		if d.IsDir() || !strings.HasSuffix(name, ".go") || strings.HasSuffix(name, "_test.go") {
			return nil
		}
		src, err := fs.ReadFile(fsys, name)
		if err != nil {
			return err
		}
		p, err := checkFile(name, src)
		problems = append(problems, p...)
		return err
	})
	return problems, err
}

// CheckKept looks at the files with these names, slash-separated: each is small, and text unless it is a test's data.
func CheckKept(fsys fs.FS, names []string) ([]Problem, error) {
	var problems []Problem
	for _, name := range names {
		data, err := fs.ReadFile(fsys, name)
		if err != nil {
			return problems, err
		}
		if len(data) > MaxBytes {
			problems = append(problems, Problem{name, 0, fmt.Sprintf("%d bytes, at most %d: it does not belong here", len(data), MaxBytes)})
		}
		if bytes.IndexByte(data, 0) >= 0 && path.Base(path.Dir(name)) != "testdata" {
			problems = append(problems, Problem{name, 0, "is binary: only what is in a folder testdata may be"})
		}
	}
	return problems, nil
}

func checkFile(name string, src []byte) ([]Problem, error) {
	var problems []Problem
	if n := bytes.Count(src, []byte("\n")); n > MaxLines {
		problems = append(problems, Problem{name, n, fmt.Sprintf("%d lines, at most %d: split it", n, MaxLines)})
	}
	files := token.NewFileSet()
	f, err := parser.ParseFile(files, name, src, parser.ParseComments|parser.SkipObjectResolution)
	if err != nil {
		return problems, err
	}
	for _, spec := range f.Imports {
		imported, err := strconv.Unquote(spec.Path.Value)
		if err != nil {
			return problems, err
		}
		if what := checkImport(name, imported); what != "" {
			problems = append(problems, Problem{name, files.Position(spec.Pos()).Line, what})
		}
	}
	for _, id := range uncommented(f) {
		problems = append(problems, Problem{name, files.Position(id.Pos()).Line, id.Name + " has no comment"})
	}
	return problems, nil
}

// uncommented lists the public names of a file that nothing is said about: neither before them,
// nor behind them on the line, nor before the group that they are in.
func uncommented(f *ast.File) (list []*ast.Ident) {
	for _, decl := range f.Decls {
		switch d := decl.(type) {
		case *ast.FuncDecl:
			if d.Name.IsExported() && d.Doc == nil && !plain[d.Name.Name] && (d.Recv == nil || ast.IsExported(receiver(d.Recv.List[0].Type))) {
				list = append(list, d.Name)
			}
		case *ast.GenDecl:
			for _, spec := range d.Specs {
				switch s := spec.(type) {
				case *ast.TypeSpec:
					if s.Name.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
						list = append(list, s.Name)
					}
				case *ast.ValueSpec:
					for _, id := range s.Names {
						if id.IsExported() && d.Doc == nil && s.Doc == nil && s.Comment == nil {
							list = append(list, id)
						}
					}
				}
			}
		}
	}
	return list
}

// plain are methods of which the name says all.
var plain = map[string]bool{"String": true, "Error": true, "Unwrap": true}

// receiver is the name of a method's type.
func receiver(t ast.Expr) string {
	switch t := t.(type) {
	case *ast.StarExpr:
		return receiver(t.X)
	case *ast.IndexExpr:
		return receiver(t.X)
	case *ast.Ident:
		return t.Name
	}
	return ""
}

// checkImport returns what is wrong with a file's import, "" if nothing is.
func checkImport(file, imported string) string {
	if imported == "unsafe" {
		if strings.HasSuffix(file, "_unsafe.go") {
			return ""
		}
		return "imports unsafe: unsafe code is in files named *_unsafe.go"
	}
	r := ruleFor(path.Dir(file))
	if r == nil {
		return "no rule for this folder: add one to tests/lint"
	}
	first, _, _ := strings.Cut(imported, "/")
	switch {
	case first == module:
		dir := strings.TrimPrefix(strings.TrimPrefix(imported, module), "/")
		// The folder's own packages, but not those below it that have a rule of their own.
		if dir != "" && ruleFor(dir) == r || within(dir, r.ours) {
			return ""
		}
		return fmt.Sprintf("imports %s against the arrows: %s may import %s (%s)", imported, r.name(), list(r.ours), r.why)
	case strings.Contains(first, ".") && r.theirs != nil && !within(imported, r.theirs):
		return fmt.Sprintf("imports %s: %s may import, beside the standard library, %s (%s)", imported, r.name(), list(r.theirs), r.why)
	}
	return ""
}

// ruleFor returns the rule of the folder: that of the longest name that it is in.
func ruleFor(dir string) (best *rule) {
	for i := range rules {
		r := &rules[i]
		if (dir == r.dir || r.dir != "." && strings.HasPrefix(dir, r.dir+"/")) && (best == nil || len(r.dir) > len(best.dir)) {
			best = r
		}
	}
	return best
}

func (r *rule) name() string {
	if r.dir == "." {
		return "main"
	}
	return r.dir
}

func within(p string, roots []string) bool {
	for _, root := range roots {
		if p == root || strings.HasPrefix(p, root+"/") {
			return true
		}
	}
	return false
}

func list(names []string) string {
	if len(names) == 0 {
		return "nothing of ours"
	}
	return strings.Join(names, ", ")
}
